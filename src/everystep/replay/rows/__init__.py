"""Rows: how much of a step's loss, and of its gradients, each row of the batch makes."""

from everystep.replay.rows.rows import Rows, Share, rows_of

__all__ = ["Rows", "Share", "rows_of"]

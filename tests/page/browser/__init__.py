"""A package, so that its tests share a browser.

Fixtures of scope `package` end with the last of its tests.
"""

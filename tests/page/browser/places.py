"""Addresses, and where things are on the page."""


def at(view, path):
    """Return the address of a place, with the token."""
    base, _, token = view.address.partition("/?")
    return f"{base}{path}{'&' if '?' in path else '?'}{token}"


def heading(page):
    return page.locator(".step h2").first

"""Doors: where requests come in. A door parses and prints; the router decides."""

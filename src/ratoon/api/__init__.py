"""What the daemon answers, and its clients read: frozen, with the names and units of the HTTP API.

The docstrings are what OpenAPI shows. Where they say null, it is None in Python.
"""

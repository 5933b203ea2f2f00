"""The library: sandboxes of a daemon, or of an engine in this process, by the same calls.

`ratoon.client.aio` is written by hand, and `ratoon.client.sync` is made from it by
`scripts/make_sync.py`. `ratoon` itself offers what users need of both.
"""

"""The library for asyncio. `ratoon.client.sync` is made from it."""

"""The library without asyncio. Made from `ratoon.client.aio`, but for what says that it is not."""

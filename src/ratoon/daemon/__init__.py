"""The daemon: the engine over HTTP. `app.create_app` for one in this process, `serve` for all."""

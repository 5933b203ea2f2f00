"""Snapshots: what their manifests say, and the store that publishes, verifies and deletes them."""

"""What lies on disk: snapshots, and the layers of memory and disk that they are made of."""

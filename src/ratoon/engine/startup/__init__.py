"""Starting an image twice: the first run boots it and waits, the next forks what came of it."""

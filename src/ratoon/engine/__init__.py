"""What is done: bases, forks, branches, standby and reset of sandboxes, and starts of images."""

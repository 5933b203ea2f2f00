"""What runs: QEMU, the guest in it, its network and volumes, and what the host grants them."""

"""What runs on both sides: on the host as it is here, and in the guest beside its agent."""

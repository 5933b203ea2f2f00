"""Checking a store: what is damaged, what is litter, and what can be repaired."""

"""Disk layers: qcow2 overlays whose headers name no other file."""

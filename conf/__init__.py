"""Hydra groups, one folder a group, one file a choice; `config.py` holds their types."""

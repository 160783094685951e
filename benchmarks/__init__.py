"""Measurements of this project's parts beside their peers: `largebatch bench NAME`."""

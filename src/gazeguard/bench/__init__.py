"""Measurements that back the docs: every table comes from a command in here."""

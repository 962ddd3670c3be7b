"""Readers, reports and the watcher; a package because of its own `conftest.py`."""

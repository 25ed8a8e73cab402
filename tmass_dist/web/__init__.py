"""The search page: a web server for one gallery."""

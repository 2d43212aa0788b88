"""Serves models over HTTP, and the web page that talks to them."""

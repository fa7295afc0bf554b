"""Manifests: which recordings there are, and what is said in them."""

"""Recipes: small packages that a user copies and edits."""

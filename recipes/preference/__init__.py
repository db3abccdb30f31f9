"""Preference optimization: of two answers to a prompt, the better one."""

"""Configs from files and flags, and what is checked of them before anything is loaded."""

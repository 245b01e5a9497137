"""Measures shmdomains beside what would be used instead: see README.md."""

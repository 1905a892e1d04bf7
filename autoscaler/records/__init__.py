"""Decisions and memory that outlive a process: the database, and what is read from it afterwards.

Must not know metrics servers, nor who may act.
"""

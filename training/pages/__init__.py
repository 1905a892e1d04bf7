"""What is written for people: reports, pages of the documentation, pictures and tables.

Must not know how the figures came about.
"""

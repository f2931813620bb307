"""What start.py is made of: environments, the search for a browser, the test run.

Standard library only, since it runs before anything is installed.
"""

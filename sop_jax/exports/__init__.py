"""Networks in the forms that other projects and other runtimes load."""

"""Taylor attention: Based's kernel."""

"""What one trainer or tool needs, a module for each; none is imported before it is asked for by name."""

"""A closed world of countries: passages to search, and questions that need search and arithmetic."""

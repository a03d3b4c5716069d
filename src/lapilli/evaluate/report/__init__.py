"""Reports of evaluations: tables, and questions with the answers of several models side by side."""

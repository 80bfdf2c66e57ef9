"""What others can test their own hosts with; needs pytest, which nothing else of advmed imports."""

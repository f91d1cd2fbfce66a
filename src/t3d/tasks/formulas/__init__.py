"""What reads and compares formulas with sympy: a package of its own, which the list of tasks does not import."""

"""Other machines where verbs run, behind ssh."""

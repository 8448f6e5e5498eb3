"""Pictures and pages made from recorded runs."""

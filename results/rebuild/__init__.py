"""Results that rebuild themselves: YAML files of commands become JSON files of numbers, and these become pages."""

"""MH-pFedHN: sites whose models differ in architecture."""

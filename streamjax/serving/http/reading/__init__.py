"""What a request says: its fields, checked, in the forms that the engine and chat templates take."""

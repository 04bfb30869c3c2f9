"""Conversations: their messages as templates take them, as text, and the turns in it that are learned."""

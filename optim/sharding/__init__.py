"""Where parameters, state and work lie among ranks, and what ranks send one another."""

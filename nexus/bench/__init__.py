"""`python -m nexus bench`: what a step of the optimizer costs beside torch's."""

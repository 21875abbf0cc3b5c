"""Local attention: compute it, build with it, convert models to it, steer, measure and plan it."""

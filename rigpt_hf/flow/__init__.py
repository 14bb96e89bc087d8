"""From layers to flow: depth as time, spacetime diffeomorphisms, lifting, local frames and gauge fixing."""

"""What a run costs on clusters that are not at hand: a cost model (``costs``), and the controller under load
(``controller_load``). SCALE.md at the root of the repository explains both and shows their tables."""

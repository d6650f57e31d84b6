"""Predicts, before anything is loaded, how much memory a run takes and which settings make it fit."""

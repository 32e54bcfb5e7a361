"""An autoencoder of streamlines."""

"""Model factories that job files can name as "autoprune.models.cifar_resnet:resnet20"."""

"""What image-conditioned tasks are given of an image: low resolution, holes, grey, blur, JPEG."""

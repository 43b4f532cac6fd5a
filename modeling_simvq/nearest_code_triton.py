def triton_can_search(q):
    return False


def search_gpu(q, c):
    raise NotImplementedError

def make(paths, gpu_id):
    import report

    return report.make(paths, gpu_id=gpu_id)
